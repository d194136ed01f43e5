"""How the libraries say that a device or the host has no memory left."""

import re

# torch, CUDA's runtime and driver, HIP, Metal and NCCL say it in words; libraries on them by a status. cuBLAS says
# that it is not initialized where the card has no room for its handle.
_WORDS = re.compile(
    r"out of (device |host |shared )?memory|(can't|cannot|could not|failed to|unable to) allocate( \S+)? memory"
    r"|out_of_(device|host)_memory|erroroutofmemory"
    r"|\b(cublas|cublaslt|cudnn|cusolver|cusparse|curand|hipblas|rocblas|miopen)_?status_"
    r"(alloc_failed|allocation_failed|not_initialized|internal_error_(device|host)_allocation_failed|memory_error)"
    r"|\bcufft_alloc_failed|\bur_result_error_out_of_(resources|device_memory|host_memory)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the host has no memory left."""
    return isinstance(error, MemoryError) or _WORDS.search(str(error)) is not None
