"""Measures a machine, fits what the objective needs of it, writes a hardware file.

What measures, `moetuner.calibration.measure`, needs torch; all else does not.
"""
