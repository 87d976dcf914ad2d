"""Proofs that a layout computes what one plain process would."""
