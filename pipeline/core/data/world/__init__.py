"""A generated encyclopedia: invented entities, their passages, and multi-hop questions with known answers."""
