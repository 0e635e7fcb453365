"""The step of the port-Hamiltonian rules in C: its library, and the plan of a step of many tensors."""

from odeopt.stepping.native.library import native_status
from odeopt.stepping.native.plan import NativeStep, native_obstacle

__all__ = ["NativeStep", "native_obstacle", "native_status"]
