"""What is fast, measured: ratios against a limit or a peer in the same run, several runs, median and spread."""
