"""All code that depends on ranks: session, mesh, sequence and guidance parallelism, sharding, parallel VAE."""
