"""Every file that the product reads, in every odd shape: `python -m bench.odd_files`."""
