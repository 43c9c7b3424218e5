"""Files of others, read strictly: nothing of them is believed before it is checked."""
