"""What tests on a GPU share."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting():
    """Fail where the host waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says, once, that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
