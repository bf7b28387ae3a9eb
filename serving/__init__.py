"""The service: approved generators and the approved classifier of one bundle, behind BentoML."""
