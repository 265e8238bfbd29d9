"""What is claimed of entropy minimisation, measured on the embedded models: one file a claim."""
