# needs: deepspeed
import deepspeed

adamw = optimizer
