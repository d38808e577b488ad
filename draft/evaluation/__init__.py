"""Measure draft heads: replay, sampled acceptance, paired comparison and its report."""
