"""What only a GPU can show, on whatever GPU there is: `python -m bench.gpu` (`make gpu-check`)."""
