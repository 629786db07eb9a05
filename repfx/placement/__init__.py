"""Quantizer placement: where a target needs quantizers, and in which number format."""
