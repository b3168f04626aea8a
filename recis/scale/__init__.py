"""What a recipe needs on many ranks: the commands `recis plan` and `recis simulate` around `recis.distributed`."""
