"""Compiled GPU code on the CPU: an interpreter of PTX, a driver for Triton and a runtime for csrc/cuda that use it."""
