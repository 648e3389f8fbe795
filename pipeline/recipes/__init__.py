"""Each training system as a readable function over the cluster's verbs."""
