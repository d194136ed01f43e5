"""The modulation table: what sees only conditioning is found, computed ahead, and replayed."""
