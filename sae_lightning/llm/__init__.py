"""The language model: loading it, naming its sites, reading them and replacing them."""
