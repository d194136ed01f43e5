"""What a run is made of: encode, denoise and decode, each loading only its own components.

This package knows torch and diffusers, and nothing of runs, stores or command lines.
"""

from stages.library_remarks import leave_out

leave_out()
