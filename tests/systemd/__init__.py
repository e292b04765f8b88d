"""The Debian package on a real systemd; not part of the ordinary tests, since it boots a machine of its own."""
