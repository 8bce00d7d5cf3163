"""Side-by-side clips and the page that a person answers on."""
