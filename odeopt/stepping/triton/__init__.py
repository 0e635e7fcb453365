"""The coordinate part of the port-Hamiltonian rules on CUDA, as kernels in Triton."""

from odeopt.stepping.triton.step import TritonKernels, triton_obstacle

__all__ = ["TritonKernels", "triton_obstacle"]
