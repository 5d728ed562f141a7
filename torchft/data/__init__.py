"""Rows to batches: tokenizers, chat templates, tokens and masks, data sets, packing, loading, reports."""
