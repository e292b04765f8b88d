"""Put on the path of a daemon whose wall clock is to be set."""
