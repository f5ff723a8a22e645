# needs: accelerate
from accelerate import Accelerator
