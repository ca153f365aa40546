"""Tells errors that mean that memory has run out from all others."""

import torch

# torch's own words on a CPU, for a size that no memory has, and on a GPU; the last three are those of cuBLAS and cuDNN
# when they load something on a GPU that other processes have filled.
TEXTS = (
    "can't allocate memory", "Storage size calculation overflowed", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that there is no memory left, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in TEXTS)
