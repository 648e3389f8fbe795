"""Each training method as one file over the verbs; ExSearch itself is `pipeline.em`."""
