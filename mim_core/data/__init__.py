"""Datasets: sources that read what users have, packs that training reads, and the order of batches."""
