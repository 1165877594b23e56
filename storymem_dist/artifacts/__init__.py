"""What a run leaves on disk: run folder, records, videos."""
