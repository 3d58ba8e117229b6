"""Triton kernels, one idea per file. Each says which plain computation it equals; tests hold it to that."""
