"""Tests of the admission core: rules one by one, random machines, a reference model, and a long storm."""
