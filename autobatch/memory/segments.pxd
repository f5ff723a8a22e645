# The types that Cython compiles `segments.py` with; addresses, sizes and counts are below 2**62.

cimport cython


cdef class Pool:
    cdef public bint small
    cdef public object stream
    cdef public object pool_id
    cdef public list free
    cdef public list unmapped

    @cython.locals(
        free=list, low=Py_ssize_t, high=Py_ssize_t, middle=Py_ssize_t, block=Block
    )
    cpdef Py_ssize_t place(self, long long size_bytes, long long address)
    cpdef add(self, Block block)
    cpdef remove(self, Block block)


cdef class Block:
    cdef public long long address
    cdef public long long size_bytes
    cdef public Pool pool
    cdef public object base
    cdef public int state
    cdef public long long requested_bytes
    cdef public long long searches
    cdef public bint shared
    cdef public Block prev
    cdef public Block next


cdef class Segments:
    cdef public long long allocated_bytes
    cdef public long long awaiting_bytes
    cdef public long long reserved_bytes
    cdef public long long peak_allocated_bytes
    cdef public long long peak_reserved_bytes
    cdef public long long _capacity
    cdef public long long _next_address
    cdef public long long _searches
    cdef public dict _pools
    cdef public dict _blocks
    cdef public dict _heads
    cdef public dict _awaiting

    @cython.locals(pool=Pool, before=Block, after=Block)
    cpdef Block _recycle(self, Block block)
    cpdef _absorb(self, Block block, Block after)
    @cython.locals(rest=Block)
    cpdef Block _split(self, Block block, long long size)
