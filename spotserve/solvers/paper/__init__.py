"""SpotServe's own algorithms (Miao et al., ASPLOS'24), as its artifact runs them and as the paper prints them.

They are solvers like the others, and the yardstick of the others: each is a pure function over plain values, and the
published figures are met to the digit.
"""
