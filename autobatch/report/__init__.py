"""What is said about a plan and how it looks: as text, Markdown, HTML, tables and charts.

Imports advice, records and what is below; plan, equivalence and cli import its modules.
"""
