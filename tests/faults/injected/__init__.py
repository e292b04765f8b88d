"""Put on the path of a daemon that is to meet a fault inside."""
