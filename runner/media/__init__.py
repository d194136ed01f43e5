"""What a run gives: pictures and previews, the files they go to, and what these say."""
