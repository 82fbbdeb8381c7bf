// What the pages draw with: the parts of Apache ECharts that they need, and no more.
import { BarChart, GraphChart, HeatmapChart, SankeyChart, TreemapChart } from "echarts/charts";
import { GridComponent, TooltipComponent, VisualMapComponent } from "echarts/components";
import { init, use } from "echarts/core";
import { SVGRenderer } from "echarts/renderers";

use([
  BarChart,
  GraphChart,
  GridComponent,
  HeatmapChart,
  SankeyChart,
  SVGRenderer,
  TooltipComponent,
  TreemapChart,
  VisualMapComponent,
]);

export { init };
