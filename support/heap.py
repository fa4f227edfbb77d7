"""What glibc's malloc does with the memory of tensors, on Linux: it keeps what is freed, in large pages.

keep_freed_memory()      at the start of every stage
return_freed_memory()    between two stages in one process, whenever a run saves last/, and after each of its steps
                         while memory_is_short()

By default glibc returns the memory of large tensors to the kernel, which must clear each page before it gives it out
again: thousands of pages per step on a CPU. And the pages have 4 KiB, so that each pass over a tensor looks up
thousands of addresses; with pages of 2 MiB (transparent huge pages) a GRPO step was 1.1 to 1.2 times as fast in
three pairs of runs on a virtual machine, not significant after a correction for three stages (results/benchmarks.md).
Other systems and C libraries stay as they are.
"""

import contextlib
import ctypes
import gc
import os

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # malloc.h
HUGE_PAGE = 14  # sys/mman.h: MADV_HUGEPAGE


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next tensor, and the kernel to use large pages for it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)  # return only blocks above 32 MiB, the highest value allowed
        libc.mallopt(TRIM_THRESHOLD, -1)  # never return the free end of the heap
        reserve_heap(libc)


def reserve_heap(libc):
    """Extend the heap by addresses without memory, up to 4 GiB, which later tensors fill; large pages there."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    room = min(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    libc.mallopt(MMAP_MAX, 0)  # else so large a block is no part of the heap
    libc.free(libc.malloc(room))
    libc.mallopt(MMAP_MAX, 65536)  # glibc's default
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:  # a file's name may be no text
        heap = [line.split()[0].split("-") for line in file if line.rstrip().endswith("[heap]")]
    for start, end in heap:  # an error, of a kernel without large pages, changes nothing
        start, end = int(start, 16), int(end, 16)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), HUGE_PAGE)


def memory_is_short(info="/proc/meminfo", own="/proc/self/statm"):
    """Whether less than a quarter of the machine's memory is left, and this process holds an eighth of it or more: a
    small one would gain nothing by giving back. False where the system does not say."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        with open(info, encoding="utf-8") as file:
            sizes = dict(line.split()[:2] for line in file)  # {"MemTotal:": kB, …}
        with open(own, encoding="utf-8") as file:
            held = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024  # kB
        total, left = int(sizes["MemTotal:"]), int(sizes["MemAvailable:"])
        return left < total / 4 and held >= total / 8
    return False


def return_freed_memory():
    """Give glibc's freed memory back to the kernel after all, once."""
    gc.collect()  # a run and its hooks hold each other
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        reserve_heap(libc)
