"""Drops a file onto a window by the X drag-and-drop protocol (XDND 5), as a file manager does. Needs python3-xlib.

python3 drop_file.py FILE X Y WINDOW_CLASS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from Xlib import X, Xatom, display
from Xlib.protocol import event
from Xlib.xobject.drawable import Window

VERSION = 5
WAIT_S = 20.0


class Source:
    """The program that the file is dragged out of."""

    def __init__(self, data: bytes) -> None:
        self.display = display.Display()
        self.root = self.display.screen().root
        self.window = self.root.create_window(0, 0, 1, 1, 0, X.CopyFromParent, event_mask=X.PropertyChangeMask)
        self.data = data
        self.answers: set[str] = set()
        self.window.set_selection_owner(self.atom("XdndSelection"), X.CurrentTime)

    def atom(self, name: str) -> int:
        return self.display.intern_atom(name)

    def aware(self, wanted_class: str) -> Window:
        """The window of a class that takes drops."""
        found = [self.root]
        for window in found:
            names = window.get_wm_class() or ()
            if wanted_class in names and window.get_full_property(self.atom("XdndAware"), X.AnyPropertyType):
                return window
            found += window.query_tree().children
        raise SystemExit(f"no window of class {wanted_class} takes drops")

    def tell(self, target: Window, kind: str, *numbers: int) -> None:
        data = [self.window.id, *numbers, 0, 0, 0, 0][:5]
        message = event.ClientMessage(window=target, client_type=self.atom(kind), data=(32, data))
        target.send_event(message)
        self.display.flush()

    def serve(self, until: str, within_s: float = WAIT_S) -> bool:
        """Answer the target's questions until it has said this."""
        end = time.monotonic() + within_s
        self.answers.discard(until)
        while until not in self.answers and time.monotonic() < end:
            while self.display.pending_events():
                self._take(self.display.next_event())
            time.sleep(0.02)
        return until in self.answers

    def _take(self, happened: event.rq.Event) -> None:
        if happened.type == X.ClientMessage:
            self.answers.add(self.display.get_atom_name(happened.client_type))
        if happened.type == X.SelectionRequest:
            asked = happened.property or happened.target
            happened.requestor.change_property(asked, happened.target, 8, self.data)
            answer = event.SelectionNotify(
                time=happened.time,
                requestor=happened.requestor,
                selection=happened.selection,
                target=happened.target,
                property=asked,
            )
            happened.requestor.send_event(answer)
            self.display.flush()


def main() -> None:
    path, x, y, wanted_class = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    source = Source(path.as_uri().encode() + b"\r\n")
    target = source.aware(wanted_class)
    source.root.warp_pointer(x, y)
    source.display.sync()
    uri_list, copy = source.atom("text/uri-list"), source.atom("XdndActionCopy")
    source.window.change_property(source.atom("XdndTypeList"), Xatom.ATOM, 32, [uri_list])
    source.tell(target, "XdndEnter", VERSION << 24, uri_list)
    for shift in (6, 3, 0):
        source.root.warp_pointer(x - shift, y)
        source.tell(target, "XdndPosition", 0, (x - shift) << 16 | y, X.CurrentTime, copy)
        if not source.serve("XdndStatus"):
            raise SystemExit("the window does not answer a drag")
        time.sleep(0.3)
    source.tell(target, "XdndDrop", 0, X.CurrentTime)
    if not source.serve("XdndFinished"):
        raise SystemExit("the window does not finish the drop")
    print("dropped")


main()
