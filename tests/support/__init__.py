"""Support for the tests: real servers on loopback and clients that speak to them byte by byte."""
