"""Everything that may say "rank": session, mesh, sequence and guidance parallelism, sharding, parallel VAE."""
