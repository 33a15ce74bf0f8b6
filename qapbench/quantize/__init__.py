"""Quantization of a loaded model: plans on linear layers, backends, receipts of linears, calibration."""
