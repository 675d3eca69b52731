"""How the page of a timeline looks. ASCII only; light, dark, narrow, and on paper."""

from __future__ import annotations

from typing import Final

__all__ = ["CHART", "STYLE"]

# What is in rows of a chart, wherever that stands: classes only, and colours by name.
CHART: Final = """
.badge{font-weight:600;padding:2px 11px;border-radius:99px;color:var(--on);background:var(--c)}
.completed{--c:var(--completed)}.failed{--c:var(--failed)}.running{--c:var(--running)}
.cancelled{--c:var(--cancelled)}.waiting{--c:var(--waiting)}.unused{--c:var(--unused)}
.mark{color:var(--c);font-weight:700;display:inline-block;width:1.3em;text-align:center}
.axis,.row>summary,.row.run,.row.item{display:grid;align-items:center;gap:0 12px;
grid-template-columns:minmax(150px,30%) 1fr 86px}
.axis{color:var(--soft);font-size:11.5px;height:20px;border-bottom:1px solid var(--rule)}
.track{position:relative;height:26px;background:repeating-linear-gradient(to right,
var(--rule) 0 1px,transparent 1px var(--tick,20%))}
.axis .track{height:18px;background:none}
.axis .track span{position:absolute;padding-left:4px;white-space:nowrap}
.row{border-bottom:1px solid var(--rule)}
.row>summary{cursor:pointer;list-style:none}.row>summary::-webkit-details-marker{display:none}
.row>summary:hover,.items summary:hover{background:var(--card)}
.row[open]>summary{background:var(--card)}
.name{padding-left:calc(var(--depth,0)*18px);overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}.name small{color:var(--soft);margin-left:6px;font-size:12px}
.row.item .name,.row.run .name{font-weight:600}.row.run .name{color:var(--soft)}
.time{text-align:right;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.track i{position:absolute;top:6px;height:14px;min-width:3px;border-radius:3px;
background-color:var(--c);color:var(--on);font:600 10px/14px sans-serif;text-align:center;
overflow:hidden}
.track i.failed,.track i.cancelled,.track i.pause{background-image:repeating-linear-gradient(
-45deg,var(--hatch) 0 2px,transparent 2px 6px)}
.track i.wait{top:12px;height:2px;background:var(--waiting);border-radius:0;min-width:0}
.track i.pause{background-color:var(--waiting);opacity:.55}
.track i.run{top:10px;height:6px;background:var(--rule);border:1px solid var(--waiting)}
.spark{display:block;width:100%;min-width:140px;height:26px}.spark path{fill:var(--running)}
.strip{display:block;width:100%;max-width:1200px;margin:4px 0 12px}
.strip path{fill:var(--c)}.strip rect{fill:transparent}
.body h3{font-size:12px;margin:10px 0 0;color:var(--soft);font-weight:600}
.body p{margin:6px 0}.body h3 small{font-weight:400}
""".strip()

STYLE: Final = (
    CHART
    + """
:root{color-scheme:light dark;--paper:#fff;--card:#f8fafc;--rule:#e2e8f0;--text:#0f172a;
--soft:#475569;--link:#1d4ed8;--completed:#00875a;--failed:#c2410c;--running:#2563eb;
--cancelled:#7c3aed;--waiting:#94a3b8;--unused:#94a3b8;--on:#fff;--hatch:#fff8}
@media(prefers-color-scheme:dark){:root{--paper:#0f172a;--card:#18233a;--rule:#2c3a52;
--text:#f1f5f9;--soft:#a8b4c6;--link:#8ab4ff;--completed:#2fbf8b;--failed:#ff8a50;
--running:#6ea8ff;--cancelled:#b794ff;--waiting:#64748b;--unused:#64748b;--on:#0f172a;
--hatch:#0005}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:28px 24px 80px;background:var(--paper);
color:var(--text);font:14px/1.5 ui-sans-serif,system-ui,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:34px 0 10px;padding-top:6px}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:1px;border-radius:3px}
:target{outline:2px solid var(--link);outline-offset:2px;border-radius:4px}
code,pre,.log{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{margin:4px 0 10px;padding:8px 10px;background:var(--card);border:1px solid var(--rule);
border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;max-height:420px;overflow:auto}
header{display:flex;flex-wrap:wrap;gap:8px 14px;align-items:center}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,max-content));
gap:8px 34px;margin:18px 0 0}
.facts dt{color:var(--soft);font-size:12px}.facts dd{margin:0;overflow-wrap:anywhere}
nav{margin-top:16px;display:flex;flex-wrap:wrap;gap:4px 18px}
.notes{margin:16px 0 0;padding:9px 14px 9px 30px;background:var(--card);
border:1px solid var(--rule);border-radius:6px;color:var(--soft)}
.graph{overflow-x:auto;padding:6px 0}
.body{padding:4px 12px 12px calc(var(--depth,0)*18px + 24px)}
.items>.body{padding-left:24px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:3px 16px 3px 0;border-bottom:1px solid var(--rule);
vertical-align:middle}th{color:var(--soft);font-weight:500;font-size:12px;white-space:nowrap}
td.n,th.n{text-align:right}.wide{overflow-x:auto}.wide table{width:100%}
.strip a:hover rect{fill:#8884}
.items>summary{cursor:pointer;padding:4px 0;color:var(--soft);border-bottom:1px solid var(--rule)}
.items ol{list-style:none;margin:0;padding:0}
.items li{display:grid;grid-template-columns:64px 20px minmax(90px,22%) 80px 1fr;gap:0 10px;
align-items:center;border-bottom:1px solid var(--rule);height:25px;content-visibility:auto;
contain-intrinsic-size:auto 25px}
.items li .track{height:24px;background:none}.items li .track i{top:8px;height:8px;min-width:4px}
.items .peek{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--soft)}
.items .n{text-align:right;font-variant-numeric:tabular-nums}
.log{list-style:none;margin:0;padding:0}
.log li{display:grid;grid-template-columns:78px 46px minmax(60px,130px) 1fr;gap:0 10px;
padding:1px 0;border-bottom:1px solid var(--rule)}
.log li>*{overflow-wrap:anywhere;white-space:pre-wrap}.log .time{white-space:nowrap}
.log .ERROR b,.log .WARN b{color:var(--failed)}
footer{margin-top:40px;color:var(--soft);font-size:12px}
@media(max-width:720px){body{padding:18px 12px 60px}
.axis,.row>summary,.row.run,.row.item{grid-template-columns:1fr 76px}
.row>summary .track,.row.run .track,.row.item .track{grid-column:1/-1;grid-row:2}
.axis .track{grid-column:1/-1}.axis>:first-child,.axis>:last-child{display:none}
.items li{grid-template-columns:52px 18px 1fr 70px;height:auto}
.items .peek{grid-column:3/-1}
.log li{grid-template-columns:70px 44px 1fr}.log li>:last-child{grid-column:1/-1}}
@media print{body{max-width:none;padding:0}nav{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
pre{max-height:none}.row,.log li{break-inside:avoid}
.items li{content-visibility:visible}}
""".strip()
)
