# The types that Cython compiles `allocator.py` with.

cimport cython

from autobatch.memory.expandable cimport ExpandableSegments
from autobatch.memory.segments cimport Block, Pool


cdef class CachingAllocator(ExpandableSegments):
    cdef public long long alloc_retries
    cdef public long long _limit
    cdef public long long _oversize
    cdef public bint _expandable
    cdef public bint _collects
    cdef public bint _selective
    cdef public dict _rounded

    @cython.locals(
        size=cython.longlong,
        small=cython.bint,
        pool=Pool,
        index=Py_ssize_t,
        block=Block,
        splits=cython.bint,
        allocated=cython.longlong,
    )
    cpdef Block malloc(self, object size_bytes, object stream=*, object pool_id=*)
    cpdef free(self, Block block)
    @cython.locals(
        live=list,
        peak=cython.longlong,
        event=Py_ssize_t,
        peak_event=Py_ssize_t,
        index=Py_ssize_t,
        block=Block,
        freed=Block,
    )
    cpdef run(self, object sizes, object events, object streams=*, object timeline=*)
