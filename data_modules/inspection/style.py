"""How a preview page looks: one style sheet, light and dark, without any request."""

from __future__ import annotations

COLOURS = ("#e63946", "#1d9bf0", "#12b76a", "#f79009", "#9b5de5", "#00b4d8", "#ff5d8f", "#8ac926", "#b5651d", "#6c757d")
"""A mark's colour is that of its number modulo their count; mark 1 takes the second."""
NUM_COLOURS = len(COLOURS)

_MARKS = "".join(f".m{number}{{--mark:{colour}}}" for number, colour in enumerate(COLOURS))

PAGE_STYLE = (
    """
:root{--ink:#1c1f24;--soft:#667085;--paper:#fff;--ground:#f3f4f6;--line:#e3e5e8;--human:#eef2f7;--accent:#2a6f97}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#98a2b3;--paper:#1e2126;--ground:#14161a;--line:#30343b;
--human:#282d35;--accent:#7cc4e8}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
input[type=radio]{position:absolute;opacity:0;pointer-events:none}
header{padding:28px 32px 12px;max-width:1800px;margin:auto}
h1{font-size:22px;margin:0 0 2px;overflow-wrap:anywhere}
header p{margin:0 0 14px;color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:8px}
nav label{border:1px solid var(--line);background:var(--paper);border-radius:99px;padding:3px 14px;cursor:pointer;
font-size:14px}
nav label b{font-weight:500;opacity:.6;margin-left:4px}
nav label:hover{border-color:var(--accent)}
#all:checked~header label[for=all]{background:var(--ink);color:var(--paper)}
#all:focus-visible~header label[for=all]{outline:2px solid var(--accent)}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:20px;padding:12px 32px 48px;
max-width:1800px;margin:auto;align-items:start}
.card{background:var(--paper);border:1px solid var(--line);border-radius:12px;overflow:hidden;padding-bottom:14px;
box-shadow:0 1px 2px rgba(16,24,40,.06)}
.pictures{background:var(--ground);display:flex;flex-direction:column;gap:2px}
figure{margin:0;position:relative;text-align:center;background:repeating-conic-gradient(var(--ground) 0 25%,
var(--line) 0 50%) 0 0/16px 16px}
.frame{position:relative;display:inline-block;max-width:100%;vertical-align:top}
.frame img{display:block;max-width:100%;max-height:420px;width:auto;height:auto}
.frame svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
figcaption{font-size:11px;color:var(--soft);background:var(--paper);text-align:right;padding:3px 16px 0}
.mark .under,.mark .over{fill:none;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}
.mark .under{stroke:#fff;stroke-width:4.5px;opacity:.85}
.mark .over{stroke:var(--mark);stroke-width:2.2px}
.mark.point .over{fill:var(--mark);stroke:#fff;stroke-width:1.5px}
.mark .tag{fill:var(--mark);stroke:#fff;stroke-width:1.5px;vector-effect:non-scaling-stroke}
.mark text{fill:#fff;font-family:system-ui,sans-serif;font-weight:600;text-anchor:middle;dominant-baseline:central}
h2{font:600 13px/1.4 ui-monospace,SFMono-Regular,Menlo,monospace;margin:12px 16px 0;overflow-wrap:anywhere}
.facts{margin:0 16px 10px;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.facts b{color:var(--accent);font-weight:600}
.turns{display:flex;flex-direction:column;gap:6px;padding:0 16px;max-height:300px;overflow:auto}
.turn{max-width:92%;border-radius:10px;padding:6px 11px;unicode-bidi:isolate}
.turn p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
.human{background:var(--human);align-self:flex-start;border-bottom-left-radius:3px}
.assistant{border:1px solid var(--line);align-self:flex-end;border-bottom-right-radius:3px}
.chip{color:#fff;background:var(--mark);border-radius:6px;padding:0 5px;font-size:.88em;white-space:nowrap}
.cut{color:var(--soft)}
.problem{color:#b42318;background:#fef3f2;margin:12px 16px 0;padding:6px 11px;border-radius:8px;font-size:14px;
overflow-wrap:anywhere}
details{margin:10px 16px 0;font-size:13px;color:var(--soft)}
summary{cursor:pointer}
pre{margin:6px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:240px;overflow:auto}
"""
    + _MARKS
)
