"""How many models of timm and transformers can be predicted, and why the others cannot."""
