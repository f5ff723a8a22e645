# The types that Cython compiles `expandable.py` with.

from autobatch.memory.segments cimport Segments


cdef class ExpandableSegments(Segments):
    cdef public object settings
