"""Labelled time series from files: ``.ts`` of timeseriesclassification.com, UCI's character trajectories (``.mat``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import DataError

#: Series, (channels, places) float32 each, and their labels.
Labelled = tuple[list[np.ndarray], list[str]]


def read_time_series(path: Path) -> Labelled:
    """The series of a file, or of all ``.ts`` files of a folder in the order of their names.

    Raises:
        DataError: there is nothing there, or it is in another format.
    """
    files = sorted(path.glob("*.ts")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data: no .ts file in {path}")
    series: list[np.ndarray] = []
    labels: list[str] = []
    for file in files:
        try:
            found = _read_mat(file) if file.suffix == ".mat" else _read_ts(file)
        except OSError as error:
            raise DataError(f"data: cannot read {file}: {error}") from error
        series += found[0]
        labels += found[1]
    return series, labels


def _read_ts(path: Path) -> Labelled:
    """Lines ``v,v,v:v,v,v:label`` after ``@data``: the channels between colons, "?" or NaN where one has ended."""
    series, labels = [], []
    with open(path, encoding="utf-8") as file:
        lines = iter(enumerate(file, 1))
        for _, line in lines:
            if line.strip().lower() == "@data":
                break
        for number, line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            *channels, label = line.strip().split(":")
            try:
                values = [np.array(channel.replace("?", "nan").split(","), np.float32) for channel in channels]
                stacked = np.stack(values)
            except ValueError as error:
                raise DataError(f"data: {path}, line {number}: {error}") from error
            series.append(stacked[:, ~np.isnan(stacked).all(0)])
            labels.append(label)
    if not series:
        raise DataError(f"data: {path} has no series after a line @data")
    return series, labels


def _read_mat(path: Path) -> Labelled:
    """``mixout``, a cell of (3, places) each, and ``consts.charlabels``, from 1."""
    try:
        import scipy.io
    except ImportError as error:
        raise DataError(
            f"data: {path} needs scipy; install it with: pip install 'longscan[experiments]'. .ts files need none"
        ) from error
    try:
        content: dict[str, Any] = scipy.io.loadmat(str(path), simplify_cells=True)
        series = [np.asarray(values, np.float32) for values in content["mixout"]]
        labels = [str(int(label)) for label in np.ravel(content["consts"]["charlabels"])]
    except OSError:
        raise
    except Exception as error:  # scipy raises errors of many kinds
        raise DataError(f"data: {path} is no file of character trajectories: {error!r}") from error
    if len(series) != len(labels):
        raise DataError(f"data: {path} has {len(series)} series and {len(labels)} labels")
    return series, labels
