"""Reductions per bag on the CPU: numba loops over bags start .. stop - 1, left folds in row order.

Rows outside, columns inside: memory is read in its order, and a small buffer holds what each column has so far. Of a single
column the sums stay in registers.
"""

import numpy as np

from recis_kernels.dispatch import njit


@njit
def sum_loop(source, ends, target, start, stop):
    dim, zero = source.shape[1], source.dtype.type(0)
    if dim == 1:
        for bag in range(start, stop):
            total = zero
            for row in range(ends[bag], ends[bag + 1]):
                total += source[row, 0]
            target[bag, 0] = total
        return
    for bag in range(start, stop):
        for column in range(dim):
            target[bag, column] = zero
        for row in range(ends[bag], ends[bag + 1]):
            for column in range(dim):
                target[bag, column] += source[row, column]


@njit
def spread_loop(source, ends, target, start, stop):
    for bag in range(start, stop):
        for row in range(ends[bag], ends[bag + 1]):
            for column in range(source.shape[1]):
                target[row, column] = source[bag, column]


@njit
def place_loop(source, rows, target):
    for bag in range(source.shape[0]):
        for column in range(source.shape[1]):
            if rows[bag, column] < target.shape[0]:
                target[rows[bag, column], column] = source[bag, column]


@njit
def _max_column(source, ends, tops, rows, start, stop):
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        top, best = source.dtype.type(0), source.size
        if first < last:
            top, best = source[first], first
        for row in range(first + 1, last):
            value = source[row]
            if value > top or (value != value and top == top):
                top, best = value, row
        tops[bag] = top
        rows[bag] = best


@njit
def max_loop(source, ends, tops, rows, start, stop):
    dim = source.shape[1]
    if dim == 1:
        _max_column(source.reshape(-1), ends, tops.reshape(-1), rows.reshape(-1), start, stop)
        return
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        for column in range(dim):
            tops[bag, column] = source[first, column] if first < last else 0
            rows[bag, column] = first if first < last else source.shape[0]
        for row in range(first + 1, last):
            for column in range(dim):
                value, top = source[row, column], tops[bag, column]
                if value > top or (value != value and top == top):
                    tops[bag, column] = value
                    rows[bag, column] = row


@njit
def _softmax_column(source, ends, target, start, stop):
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        top, total = source.dtype.type(-np.inf), source.dtype.type(0)
        for row in range(first, last):
            top = max(top, source[row])
        for row in range(first, last):
            power = np.exp(source[row] - top)
            target[row] = power
            total += power
        for row in range(first, last):
            target[row] /= total


@njit
def softmax_loop(source, ends, target, start, stop):
    dim = source.shape[1]
    if dim == 1:  # the same steps with the sums in registers
        _softmax_column(source.reshape(-1), ends, target.reshape(-1), start, stop)
        return
    tops, totals = np.empty(dim, dtype=source.dtype), np.empty(dim, dtype=source.dtype)
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        tops[:] = -np.inf
        totals[:] = 0
        for row in range(first, last):
            for column in range(dim):
                tops[column] = max(tops[column], source[row, column])
        for row in range(first, last):
            for column in range(dim):
                power = np.exp(source[row, column] - tops[column])
                target[row, column] = power
                totals[column] += power
        for row in range(first, last):
            for column in range(dim):
                target[row, column] /= totals[column]


@njit
def _softmax_grad_column(softmax, grad, ends, target, start, stop):
    for bag in range(start, stop):
        dot = softmax.dtype.type(0)
        for row in range(ends[bag], ends[bag + 1]):
            dot += softmax[row] * grad[row]
        for row in range(ends[bag], ends[bag + 1]):
            target[row] = softmax[row] * (grad[row] - dot)


@njit
def softmax_grad_loop(softmax, grad, ends, target, start, stop):
    """d v = y * (g - sum over the bag of y * g)."""
    dim = softmax.shape[1]
    if dim == 1:
        _softmax_grad_column(softmax.reshape(-1), grad.reshape(-1), ends, target.reshape(-1), start, stop)
        return
    dots = np.empty(dim, dtype=softmax.dtype)
    for bag in range(start, stop):
        first, last = ends[bag], ends[bag + 1]
        dots[:] = 0
        for row in range(first, last):
            for column in range(dim):
                dots[column] += softmax[row, column] * grad[row, column]
        for row in range(first, last):
            for column in range(dim):
                target[row, column] = softmax[row, column] * (grad[row, column] - dots[column])
