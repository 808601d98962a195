"""Tables and pictures made from the results of finished runs."""
