"""Steps that are run and measured: bench, calibration, accounting of tensors."""
