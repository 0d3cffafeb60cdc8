"""What a user can mend, and which errors are for lack of memory."""


class UserError(Exception):
    """Something the user can mend; the message is one line that names the flag or file and the mend."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host or the GPU, by PyTorch, Triton, CUDA or cuBLAS."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    words = ("out of memory", "alloc_failed", "can't allocate memory")
    return known or any(part in str(error).lower() for part in words)
