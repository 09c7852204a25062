"""A service that answers texts with a compiled bundle. Run it with `python -m service`."""
